if __name__ != "espalier.trainers":  # a second copy, whose classes would be others
    raise ImportError("import espalier.trainers in place of trainers")

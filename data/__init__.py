if __name__ != "espalier.data":  # a second copy, whose classes would be others
    raise ImportError("import espalier.data in place of data")

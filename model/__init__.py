if __name__ != "espalier.model":  # a second copy, whose classes would be others
    raise ImportError("import espalier.model in place of model")

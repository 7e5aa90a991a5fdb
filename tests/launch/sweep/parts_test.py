"""Command lines are legible, and mean the same words."""

import shlex

from espalier.launch.sweep.parts import command_line


def test_a_command_line_means_its_words():
    words = ["a b", "--gin.MODEL_DIR='/x y'", "--gin.MESH={'fsdp': -1}", "it's $5", "both \" and '"]
    assert shlex.split(command_line(words)) == words
    assert command_line(words[1:3]) == "\"--gin.MODEL_DIR='/x y'\" \"--gin.MESH={'fsdp': -1}\""

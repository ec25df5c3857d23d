"""Whether the kernels of this installation are right on a card.

cases    small awkward calls of every op that has a kernel
judge    compares a kernel's results with the eager twin's
runner   does so in a process that may die
record   keeps what was found, for calls that come later
"""

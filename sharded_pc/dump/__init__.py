"""What stands in a recorded stream, told message by message: `messages(file)`.

The stream is read once, in pieces, from a file or a pipe; its parser is the receiver's
(wire/reader.py), which here also takes what a receiver refuses.

    window    bytes in pieces          wishes    what the parsers here ask for beyond wire/steps.py
    reader    sections, commands       records   RAM records, counted
    multifd   a channel's packets      walk      drives a parser over a window: messages as dicts
    explain   events as dicts          totals    what all messages come to
    text      a message as a line
"""

from sharded_pc.dump.walk import Walk

__all__ = ["Walk"]

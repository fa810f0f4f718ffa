"""TLS around a source's connections.

Everything behind a connection reads and writes a plain descriptor, in C and from several processes.
So TLS ends in front of it: a process of its own (`serving.py`) holds the keys and, for each
connection, the only SSL object (`pump.py`); what was inside the TLS is one end of a socket pair
here (`door.py`).  A connection is accepted, opened by the door, and only then looked at
(`transport/candidates.py`): who comes through has shown a certificate or a key.

=================  ===============================================================================
`credentials.py`   what the files say, in QEMU's names, and what is wrong with them
`refusals.py`      why a handshake failed, for whoever has to mend it
`pump.py`          bytes, both ways, until either end is over
`serving.py`       the process
`process.py`       its life, and who notices that it does not go on
`door.py`          the coordinator's end of it
`accepting.py`     a listening socket whose connections come through the door
=================  ===============================================================================
"""

"""What `sharded-pc-emulator` starts beside a QEMU: its settings, its answer, the receiver's name.

The program itself is emulator.c; the receiver's process is `sharded-pc emulate` (cli/emulate.py).
"""

"""The C core (headers in this folder say what it does) and its Python face.

Only this package imports the extension.  One module for each area of the core; they turn return
codes into errors and own descriptors and buffers.  Calls release the GIL: one call per batch or
per loop, never per page.
"""

"""The only place sockets are made, and descriptors handed from process to process."""

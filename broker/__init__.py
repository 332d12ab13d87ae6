"""The broker: pure rules in `core`, bytes on disk in `store`, sockets in `server`."""

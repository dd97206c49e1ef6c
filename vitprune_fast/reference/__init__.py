"""Readable references of the ops: plain torch, any dtype, no tricks."""

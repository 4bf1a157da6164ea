"""A seeded, bounded fuzzer over files, widgets, sockets, saved chunks and Cancel.

Its rule: a sentence that says what to do, or a right result; no hang, no memory out of proportion, and the next good
graph gives the same latents as ever. `child.py` runs the cases inside the host, `watch.py` watches it from outside.
"""

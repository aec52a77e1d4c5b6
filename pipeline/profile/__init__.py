"""`cropfeed profile`: measures any loader, and what Cropfeed would deliver in its place.

- `target`: the loader that the user names, and errors in the user's code. `batches`: the images of a batch.
- `worker`: the process of a loader; `runner` starts and controls it. `processes`: CPU time and memory of a process's family.
- `measure`: the whole procedure. `verdict`: its figures in words. `command`: the command line.
"""

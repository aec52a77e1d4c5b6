"""What tools/doctor.py checks: the interpreter and its packages, what a GPU needs, the machine, and the data set."""

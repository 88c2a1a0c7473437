"""What setup.py is made of: which sources, compiled how. Imports neither torch nor moetrain."""

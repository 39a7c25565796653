"""The command line: what each command does, without the printing, and the arguments and files that it reads."""

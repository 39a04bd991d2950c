"""One run in many processes, and what each computes with."""

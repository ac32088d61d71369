"""Dataset folders for other trainers than TRL."""

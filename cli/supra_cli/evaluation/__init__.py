"""What eval, report and demo measure: a student beside its teacher, on the tasks of the core."""

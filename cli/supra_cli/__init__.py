"""The command line: thin; decides nothing that a library user could not."""

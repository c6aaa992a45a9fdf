"""What a run would cost on machines that one does not have: a model of time by parts."""

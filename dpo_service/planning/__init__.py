"""What a job will need, before it runs: memory by part, time, what would make it fit. No torch; loads nothing."""

"""What pytest is not to import when it looks for doctests: programs that tests start."""

collect_ignore = ["elastic_job.py", "flower_job", "grace_job.py"]

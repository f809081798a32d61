"""The supervisor: owns RAM blocks, core userfaultfd and quit eventfd, keeps the door, the fleet of workers and the
status."""

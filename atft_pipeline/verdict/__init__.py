"""Numbers in, verdict out: validity checks, criterion, milestones, health, gate."""

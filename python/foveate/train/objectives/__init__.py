"""What a task adds to the loop, an `Objective` each; `choose` has their list."""

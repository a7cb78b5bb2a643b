"""What the method is measured against: each baseline one file, each called as ``DanceOPD.step`` is."""

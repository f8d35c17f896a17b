"""Where arrays live: the device mesh, the rules from logical to mesh axes, the plan by leaf."""

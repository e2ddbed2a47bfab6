"""Learning the learning rate while training, and racing it against other ways to find one."""

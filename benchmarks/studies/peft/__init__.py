"""Every method of PEFT: how exactly, by which routes and at what cost it is scored."""

"""The only code that knows what a virtual machine is made of."""

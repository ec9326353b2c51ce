"""Names of the mesh's axes, which models and shardings share."""

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
DATA = "data"
FSDP = "fsdp"  # splits parameters too
TENSOR = "tensor"  # splits heads and columns

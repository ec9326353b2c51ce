"""Names of the mesh's axes, which models and shardings share."""

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
TENSOR = "tensor"  # the axis that splits heads and columns

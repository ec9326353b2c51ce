"""Names of the mesh's axes, which models and shardings share."""

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
DATA = "data"
FSDP = "fsdp"  # also splits parameters
CONTEXT = "context"  # splits the slots of each row, and parameters like FSDP
TENSOR = "tensor"  # splits heads and columns
SHARDS = (FSDP, CONTEXT)  # the axes whose devices keep different parts of the parameters
COLUMNS = (TENSOR, CONTEXT, FSDP)  # the axes that split the columns of the embedding, innermost last

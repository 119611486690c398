"""One self-supervised method a file: an nn.Module whose forward(views) gives loss and scalars."""

"""The diagrams of the notebooks: one module for each group, and the canvas that they draw on."""

"""The weights that come with the package; each has its card beside it.

=========================  ==================================================================================
transcnn_nano.cifar10      ``timm.create_model("transcnn_nano", pretrained=True)``, and ``transcnn predict`` without a
                           checkpoint: ten classes, images of 32x32
=========================  ==================================================================================
"""

PACKAGED = "transcnn_nano.cifar10"  # what ``transcnn predict`` takes without a checkpoint

"""The weights that come with the package; each has its card beside it.

============================  ===============================================================================
transcnn_nano.cifar10         ``timm.create_model("transcnn_nano", pretrained=True)``, and ``transcnn predict``
                              without a checkpoint: ten classes, images of 32x32
transcnn_micro.tiny_imagenet  ``timm.create_model("transcnn_micro", pretrained=True)``: 200 classes, images of 64x64; a
                              start for photographs and for dense prediction
============================  ===============================================================================
"""

# What each card says besides the figures: about the data, and what the weights are not good for.
NOTES = {
    "transcnn_nano.cifar10": (
        "Learnt from and scored on JPEG copies of CIFAR-10, whose pixels differ slightly from the original "
        "files'; accuracy on those is close to this, not the same (`transcnn eval transcnn_nano.cifar10 "
        "torch/cifar10` measures it where there is internet). Ten classes of small photographs: of any other "
        "picture the answer means nothing."
    ),
    "transcnn_micro.tiny_imagenet": (
        "Learnt from Tiny ImageNet: 100,000 photographs of 200 classes, cut from ImageNet and made 64x64. "
        "Scored on its published validation split, which was looked at once; the epoch was chosen on images "
        "held back from training. Twelve epochs at 32 pixels, two at 48 and nine at 64; the schedule was cut "
        "short twice on the way (`recipes/tiny_imagenet.yaml`).\n\n"
        "ImageNet's images are for non-commercial research and education, by its terms of access; whether "
        "weights learnt from them are bound by that is not settled, so see to your own case before you use "
        "them commercially.\n\n"
        "Good for: a start for small images and few of them, as a classifier's or a dense network's backbone. "
        "Not good for: naming what is in large photographs, which networks of ImageNet-1K do far better; "
        "anything but photographs; people, of whom it knows no more than that some classes show them."
    ),
}
PACKAGED = "transcnn_nano.cifar10"  # what ``transcnn predict`` takes without a checkpoint

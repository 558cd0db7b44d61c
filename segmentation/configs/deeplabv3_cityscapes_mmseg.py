# DeepLabV3, ResNet-101 and ResNet-18 in mmsegmentation's own setting.
_base_ = ["_base_/runtime.py", "_base_/pair.py", "_base_/cityscapes.py", "_base_/schedule_mmseg.py"]
model = dict(
    teacher=dict(stock="deeplabv3/deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024.py"),
    student=dict(stock="deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"),
)

# PSPNet in small, on CamVid.
_base_ = ["_base_/runtime.py", "_base_/camvid.py"]
model = dict(
    teacher=dict(stock="pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py"),
    student=dict(stock="pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py"),
)

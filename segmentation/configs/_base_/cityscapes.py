# Cityscapes: 2975 images to train on, 500 to evaluate on, 2048 x 1024 pixels, 19 classes. Crop and scale as in mmseg.
data_root = "data/cityscapes"
crop_size = (512, 1024)  # height, width; the networks' padding follows it
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize: labels are compared at their own size
    dict(type="PackSegInputs"),
]


def _dataset(split, pipeline):
    prefix = dict(img_path=f"leftImg8bit/{split}", seg_map_path=f"gtFine/{split}")
    return dict(type="NumberedDataset", dataset=dict(type="CityscapesDataset", data_prefix=prefix, pipeline=pipeline))


train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="NumberedSampler"),
    dataset=_dataset("train", train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=_dataset("val", test_pipeline),
)

"""What a newcomer would write to ask a picture a question with transformers."""

import sys

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, picture, device, dtype, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
prompt = f"USER: <image>\n{question} ASSISTANT:"
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt").to(device, model.dtype)
output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const file = Uint8Array.from(atob(document.getElementById("weights").textContent), c => c.charCodeAt(0));
const model = new Llava(data.config, read_safetensors(file.buffer));
const tokenizer = new Tokenizer(data.tokenizer), processor = new ImageProcessor(data.processor);

// The pixels of a picture, as RGBA bytes; what is transparent is laid on white.
function pixels_of(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth ?? picture.width, picture.naturalHeight ?? picture.height];
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, 0);
  return pen.getImageData(0, 0, canvas.width, canvas.height);
}

function load_picture(url) {
  return new Promise((done, failed) => {
    const picture = new Image();
    picture.onload = () => done(picture);
    picture.onerror = () => failed(new Error("this file is not a picture that the browser reads"));
    picture.src = url;
  });
}

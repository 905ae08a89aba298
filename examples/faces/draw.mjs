// Draw avatars: node draw.mjs STYLE SIZE < options.jsonl > pixels.rgb
//
// Each line of the input is the options of one avatar of a style of DiceBear ("pixelArt", "openPeeps"). The output is
// SIZE × SIZE × 3 bytes an avatar, rows from the top, on white where the avatar is transparent.

import { createInterface } from "node:readline";
import { createAvatar } from "@dicebear/core";
import * as styles from "@dicebear/collection";
import { Resvg } from "@resvg/resvg-js";

const [name, size] = [process.argv[2], Number(process.argv[3])];
if (!(name in styles) || !Number.isInteger(size) || size < 1) {
  console.error(`usage: node draw.mjs STYLE SIZE, of the styles ${Object.keys(styles).join(", ")}`);
  process.exit(2);
}

for await (const line of createInterface({ input: process.stdin })) {
  const svg = createAvatar(styles[name], JSON.parse(line)).toString();
  const rgba = new Resvg(svg, { background: "white", fitTo: { mode: "width", value: size } }).render().pixels;
  const rgb = Buffer.alloc(size * size * 3);
  for (let i = 0; i < size * size; i++) rgba.copy(rgb, 3 * i, 4 * i, 4 * i + 3);
  if (!process.stdout.write(rgb)) await new Promise((drained) => process.stdout.once("drain", drained));
}

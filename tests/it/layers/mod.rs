//! Layers around a sentinel and inside it.

mod decode;
mod decoded;
mod endpoints;
mod intensity;
mod keep_alive;
mod layer_order;
mod stacking;
mod tower_http;

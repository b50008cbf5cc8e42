//! The places that epochs can go to: the link to another `remusd`, nowhere, or (UNSAFE) a stock receiver.

pub mod blackhole;
pub mod link;
pub mod stock;

//! The places that epochs can go to: the link to another `remusd`, nowhere, or (UNSAFE) a stock receiver.

pub mod blackhole;
pub mod link;
pub mod sleep;
pub mod stock;

#[cfg(test)]
mod relay_tests;

//! remusd: keeps a Xen guest running through the loss of its host.
//!
//! The map: `protect` (primary), `backup`, `link` between them, `capture` and `stream` (what an epoch is made of),
//! `witness` (who may run), `xen` (the only unsafe code), `ops` and `api` (what people see). docs/architecture.md has the picture.

pub mod api;
pub mod audit;
pub mod backup;
pub mod capture;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod enforced;
pub mod gate;
pub mod gray;
pub mod hvm;
pub mod ids;
pub mod link;
pub mod metrics;
pub mod ops;
pub mod pair;
pub mod policy;
pub mod pool;
pub mod protect;
pub mod simulate;
pub mod state;
pub mod stream;
pub mod witness;
pub mod xen;

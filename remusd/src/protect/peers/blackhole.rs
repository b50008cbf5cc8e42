//! Nowhere (`xl remus -b`): for measuring what checkpoints cost the guest. Protects nothing.

use async_trait::async_trait;

use crate::ids::Epoch;
use crate::protect::machine::StopWhy;
use crate::protect::peer::{EpochEnd, GuestDoes, Outlet, PeerControl, PeerLost};
use crate::stream::{PageBatch, Record};

/// Takes everything and keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct Blackhole;

#[async_trait]
impl Outlet for Blackhole {
    async fn preamble(&mut self, _: bytes::Bytes) -> Result<(), PeerLost> {
        Ok(())
    }
    async fn begin(&mut self, _: Epoch, _: bool) -> Result<(), PeerLost> {
        Ok(())
    }
    async fn pages(&mut self, _: Epoch, batch: PageBatch) -> Result<u64, PeerLost> {
        Ok(batch.size() as u64)
    }
    async fn record(&mut self, _: Epoch, record: Record) -> Result<u64, PeerLost> {
        Ok(record.body.len() as u64)
    }
    async fn end(&mut self, _: EpochEnd) -> Result<(), PeerLost> {
        Ok(())
    }
}

#[async_trait]
impl PeerControl for Blackhole {
    async fn stop(&self, _: &StopWhy) {}
    fn guest_does(&self, _: Epoch, _: GuestDoes) {}
    async fn close(&self) {}
}

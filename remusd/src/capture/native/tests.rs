//! The engine on a guest that is some memory of this process.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::time::timeout;

use super::*;
use crate::stream::{CaptureItem, Layer, PAGE_SIZE};
use crate::xen::foreign::windows::{Mapping, WINDOW};

const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: usize = 2 * WINDOW;

type Memory = Arc<[AtomicU8]>;

/// The guest: its page table is one frame for each window.
struct Guest {
    windows: Vec<Memory>,
    log: Vec<u64>,
    logging: bool,
    held: u64,
    given_back: bool,
    maps: u32,
    /// A page that is away while the running guest is mapped for the first time, and back afterwards.
    away: Option<usize>,
}

fn memory() -> Memory {
    (0..WINDOW * PAGE_SIZE).map(|_| AtomicU8::new(0)).collect()
}

impl Guest {
    fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            windows: vec![memory(), memory()],
            log: vec![0; PAGES / 64],
            logging: false,
            held: PAGES as u64,
            given_back: false,
            maps: 0,
            away: None,
        }))
    }

    fn write(&mut self, gfn: usize, value: u8) {
        let at = gfn % WINDOW * PAGE_SIZE;
        for byte in &self.windows[gfn / WINDOW][at..at + PAGE_SIZE] {
            byte.store(value, Ordering::Relaxed);
        }
        self.log[gfn / 64] |= 1 << (gfn % 64);
    }

    fn page(&self, gfn: usize) -> u8 {
        self.windows[gfn / WINDOW][gfn % WINDOW * PAGE_SIZE].load(Ordering::Relaxed)
    }
}

struct Fake {
    guest: Arc<Mutex<Guest>>,
    windows: Windows,
    held: u64,
}

struct Mapped(Memory);

impl Mapping for Mapped {
    fn start(&self) -> NonNull<u8> {
        NonNull::from(&self.0[0]).cast()
    }
}

impl Source for Fake {
    fn preamble(&mut self) -> Result<Bytes, XenError> {
        Ok(Bytes::from_static(b"preamble"))
    }
    fn log_on(&mut self) -> Result<(), XenError> {
        self.guest.lock().unwrap().logging = true;
        Ok(())
    }
    fn log_off(&mut self) -> Result<(), XenError> {
        self.guest.lock().unwrap().logging = false;
        Ok(())
    }
    fn map(&mut self) -> Result<(), XenError> {
        let mut guest = self.guest.lock().unwrap();
        guest.maps += 1;
        guest.given_back = false;
        self.held = guest.held;
        for (index, window) in guest.windows.iter().enumerate() {
            let mut mapped = [u64::MAX; WINDOW / 64];
            if let Some(gfn) = guest.away.filter(|gfn| gfn / WINDOW == index) {
                mapped[gfn % WINDOW / 64] &= !(1 << (gfn % 64));
            }
            self.windows.set(index, Box::new(Mapped(Arc::clone(window))), mapped);
        }
        guest.away = None;
        Ok(())
    }
    fn differs(&mut self) -> Result<bool, XenError> {
        Ok((0..PAGES / WINDOW).any(|index| self.windows.mapped(index) != [u64::MAX; WINDOW / 64]))
    }
    fn stale(&mut self) -> Result<bool, XenError> {
        Ok(self.guest.lock().unwrap().held != self.held)
    }
    fn given_back(&mut self, _: usize) -> Result<bool, XenError> {
        Ok(self.guest.lock().unwrap().given_back)
    }
    fn dirty(&mut self, _: bool, each: &mut dyn FnMut(&[u64])) -> Result<(), XenError> {
        let mut guest = self.guest.lock().unwrap();
        assert!(guest.logging);
        each(&guest.log);
        guest.log.fill(0);
        Ok(())
    }
    fn windows(&self) -> &Windows {
        &self.windows
    }
    fn state(&mut self) -> Result<Vec<Record>, XenError> {
        Ok(vec![Record { layer: Layer::Libxc, kind: 9, body: Bytes::from_static(b"context") }])
    }
}

/// An engine, and the memory that its items make.
struct Capture {
    guest: Arc<Mutex<Guest>>,
    engine: NativeEngine,
    items: ItemReceiver,
    copy: BTreeMap<u64, u8>,
}

impl Capture {
    async fn start(hard: usize, ahead_after: Option<Duration>) -> Self {
        Self::of(Guest::new(), hard, ahead_after).await
    }

    async fn of(guest: Arc<Mutex<Guest>>, hard: usize, ahead_after: Option<Duration>) -> Self {
        let theirs = Arc::clone(&guest);
        let budget = CaptureBudget { soft: 64 << 20, hard };
        let config = NativeConfig { domid: DomId(7), budget, ahead_after };
        let (engine, items) =
            NativeEngine::over(config, move || Ok(Fake { guest: theirs, windows: Windows::new(), held: 0 }))
                .await
                .unwrap();
        Self { guest, engine, items, copy: BTreeMap::new() }
    }

    async fn call(&mut self) -> Result<EngineCall, CaptureError> {
        loop {
            let call = timeout(PATIENCE, self.engine.next_call()).await.expect("the engine says something");
            if !matches!(call, Ok(EngineCall::Progress { .. })) {
                return call;
            }
        }
    }

    async fn expect(&mut self, expected: EngineCall, reply: i32) {
        assert_eq!(self.call().await.unwrap(), expected);
        self.engine.reply(reply).await.unwrap();
    }

    /// Up to the end of an epoch; returns its pages.
    async fn epoch(&mut self) -> usize {
        let mut pages = 0;
        loop {
            match timeout(PATIENCE, self.items.recv()).await.unwrap().unwrap() {
                Some(CaptureItem::Pages(batch)) => {
                    pages += batch.entries.len();
                    for (gfn, page) in batch.entries.iter().zip(batch.data.chunks_exact(PAGE_SIZE)) {
                        self.copy.insert(*gfn, page[0]);
                    }
                }
                Some(CaptureItem::EndOfEpoch) => return pages,
                Some(_) => {}
                None => panic!("the items end"),
            }
        }
    }

    async fn begun(hard: usize, ahead_after: Option<Duration>) -> Self {
        let mut it = Self::start(hard, ahead_after).await;
        it.expect(EngineCall::SwitchQemuLogdirty { enable: true }, 0).await;
        it.expect(EngineCall::Suspend, 1).await;
        it.expect(EngineCall::Postcopy, 1).await;
        assert!(it.epoch().await >= PAGES, "the first copy has every page");
        it
    }

    fn write(&self, gfn: usize, value: u8) {
        self.guest.lock().unwrap().write(gfn, value);
    }

    fn alike(&self) {
        let guest = self.guest.lock().unwrap();
        for gfn in 0..PAGES {
            assert_eq!(self.copy.get(&(gfn as u64)).copied(), Some(guest.page(gfn)), "page {gfn}");
        }
    }

    /// The regular end; log-dirty is off afterwards.
    async fn ends(mut self, retval: i32) {
        self.expect(EngineCall::SwitchQemuLogdirty { enable: false }, 0).await;
        self.expect(EngineCall::Complete { retval, errno: 0 }, 0).await;
        assert_eq!(self.call().await.unwrap(), EngineCall::Exited(String::new()));
        assert!(!self.guest.lock().unwrap().logging);
    }
}

#[tokio::test]
async fn an_epoch_has_what_was_written() {
    let mut it = Capture::begun(1 << 30, None).await;
    for value in 1..4 {
        it.expect(EngineCall::Checkpoint, 1).await;
        it.write(5, value);
        it.write(1999, value);
        it.expect(EngineCall::Suspend, 1).await;
        it.expect(EngineCall::Postcopy, 1).await;
        assert_eq!(it.epoch().await, 2);
        it.alike();
    }
    it.engine.stop_gently();
    it.expect(EngineCall::Checkpoint, 0).await;
    it.ends(0).await;
}

#[tokio::test]
async fn an_epoch_that_is_given_up_is_dirty_still() {
    let mut it = Capture::begun(1 << 30, None).await;
    it.expect(EngineCall::Checkpoint, 1).await;
    it.write(5, 1);
    it.expect(EngineCall::Suspend, 1).await;
    it.expect(EngineCall::Postcopy, AGAIN).await;
    it.write(6, 2);
    it.expect(EngineCall::Suspend, 1).await;
    it.expect(EngineCall::Postcopy, 1).await;
    assert_eq!(it.epoch().await, 2);
    it.alike();
}

#[tokio::test]
async fn pages_that_rest_are_copied_ahead_and_others_again() {
    let mut it = Capture::begun(1 << 30, Some(Duration::ZERO)).await;
    let large = 0..700;
    it.expect(EngineCall::Checkpoint, 1).await;
    large.clone().for_each(|gfn| it.write(gfn, 1));
    it.expect(EngineCall::Suspend, 1).await;
    assert_eq!(it.call().await.unwrap(), EngineCall::Postcopy);
    // The log has been read: what is written from here on belongs to the next epoch.
    large.clone().for_each(|gfn| it.write(gfn, 2));
    it.engine.reply(1).await.unwrap();
    assert_eq!(it.epoch().await, 700);
    assert_eq!(it.call().await.unwrap(), EngineCall::Checkpoint);
    timeout(PATIENCE, async {
        // The engine reads the log at a time of its own.
        while it.guest.lock().unwrap().log[0] != 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("pages are copied ahead");
    (0..100).for_each(|gfn| it.write(gfn, 3));
    it.write(1500, 4);
    it.engine.reply(1).await.unwrap();
    it.expect(EngineCall::Suspend, 1).await;
    it.expect(EngineCall::Postcopy, 1).await;
    assert_eq!(it.epoch().await, 701, "no page twice");
    it.alike();
}

#[tokio::test]
async fn a_guest_that_ballooned_is_mapped_and_copied_anew() {
    let mut it = Capture::begun(1 << 30, None).await;
    it.expect(EngineCall::Checkpoint, 1).await;
    {
        // Another frame in the place of an old one, written to without being logged.
        let mut guest = it.guest.lock().unwrap();
        guest.windows[1] = memory();
        guest.held += 1;
        guest.windows[1][0].store(77, Ordering::Relaxed);
    }
    it.expect(EngineCall::Suspend, 1).await;
    it.expect(EngineCall::Postcopy, 1).await;
    assert_eq!(it.epoch().await, PAGES);
    it.alike();
    it.guest.lock().unwrap().given_back = true;
    // Found in the search after an epoch, that of this one or of the next; mapped anew in the epoch after it.
    let mut pages = 0;
    for _ in 0..3 {
        if pages == PAGES {
            break;
        }
        it.expect(EngineCall::Checkpoint, 1).await;
        it.expect(EngineCall::Suspend, 1).await;
        it.expect(EngineCall::Postcopy, 1).await;
        pages = it.epoch().await;
    }
    assert_eq!((it.guest.lock().unwrap().maps, pages), (3, PAGES));
    it.alike();
}

#[tokio::test]
async fn a_page_that_was_away_while_the_running_guest_was_mapped_is_copied() {
    let guest = Guest::new();
    guest.lock().unwrap().away = Some(1500);
    let mut it = Capture::of(guest, 1 << 30, None).await;
    it.write(1500, 9);
    it.expect(EngineCall::SwitchQemuLogdirty { enable: true }, 0).await;
    it.expect(EngineCall::Suspend, 1).await;
    it.expect(EngineCall::Postcopy, 1).await;
    it.epoch().await;
    it.alike();
    assert_eq!(it.guest.lock().unwrap().maps, 2);
}

#[tokio::test]
async fn an_epoch_over_budget_is_told_before_it_is_copied() {
    let mut it = Capture::start(1 << 20, None).await;
    it.expect(EngineCall::SwitchQemuLogdirty { enable: true }, 0).await;
    // The first copy passes through as it is received.
    assert!(matches!(it.items.recv().await, Ok(Some(CaptureItem::Preamble(_)))));
    let error = loop {
        match it.call().await {
            Ok(EngineCall::Suspend) => {
                (0..257).for_each(|gfn| it.write(gfn, 1));
                it.engine.reply(1).await.unwrap();
            }
            Err(error) => break error,
            Ok(other) => panic!("{other:?}"),
        }
    };
    assert!(matches!(error, CaptureError::OverBudget { .. }), "{error}");
    it.engine.stop_gently();
    it.ends(-1).await;
}

#[tokio::test]
async fn a_driver_that_goes_away_leaves_nothing_on() {
    let mut it = Capture::begun(1 << 30, None).await;
    assert_eq!(it.call().await.unwrap(), EngineCall::Checkpoint);
    let Capture { guest, engine, items, .. } = it;
    drop((engine, items));
    timeout(PATIENCE, async {
        // Its thread has nobody left to tell.
        while Arc::strong_count(&guest) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("the thread ends");
    assert!(!guest.lock().unwrap().logging);
}

#[tokio::test]
async fn a_domain_that_cannot_be_opened_is_told() {
    let config = NativeConfig::new(DomId(9));
    let error = NativeEngine::over::<Fake, _>(config, || Err(XenError::NoDomain { domid: DomId(9) })).await.err();
    assert!(error.unwrap().to_string().contains("domain 9"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is written when, given up or copied ahead: the copy is the guest after each whole epoch.
    #[test]
    fn the_copy_is_the_guest(epochs in proptest::collection::vec((proptest::collection::vec((0..PAGES, any::<u8>()), 0..40), any::<bool>(), any::<bool>()), 1..6)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut it = Capture::begun(1 << 30, Some(Duration::ZERO)).await;
            for (writes, large, again) in epochs {
                if large {
                    (0..600).for_each(|gfn| it.write(gfn, 1));
                }
                it.expect(EngineCall::Checkpoint, 1).await;
                writes.iter().for_each(|(gfn, value)| it.write(*gfn, *value));
                it.expect(EngineCall::Suspend, 1).await;
                if again {
                    it.expect(EngineCall::Postcopy, AGAIN).await;
                    writes.iter().for_each(|(gfn, value)| it.write(*gfn, value.wrapping_add(1)));
                    it.expect(EngineCall::Suspend, 1).await;
                }
                it.expect(EngineCall::Postcopy, 1).await;
                it.epoch().await;
                it.alike();
            }
        });
    }
}

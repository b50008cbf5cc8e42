//! Developer tool: captures the same suspended guest with both engines and holds the copies against each other, byte for byte.
//!
//! The native engine takes some epochs of the running guest; its last one leaves the guest suspended. Then the save helper copies the
//! whole guest as it stands. What the native epochs have built up must be what the save helper reads. Exit code 0: alike.
//! Dom0 goes on to put received packets into the buffers of a suspended guest: take its vifs down meanwhile.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use remusd::audit::gfn;
use remusd::capture::{Engine, EngineCall, ItemReceiver, NativeConfig, NativeEngine, SaveHelper, SaveHelperConfig};
use remusd::hvm::DeviceModel;
use remusd::ids::DomId;
use remusd::stream::libxc::kind;
use remusd::stream::{CaptureItem, PAGE_SIZE, PageBatch, Record};
use remusd::xen::{GuestType, Hypervisor, RealStore, SuspendGuard, Suspender, XenHypervisor, XenStore};

#[derive(Parser)]
struct Arguments {
    /// Domain id
    domid: u32,
    /// Native epochs before the comparison
    #[arg(short = 'n', default_value_t = 10)]
    epochs: u64,
    /// Milliseconds between resume and the next suspend
    #[arg(short, default_value_t = 200)]
    interval: u64,
}

const PATIENCE: Duration = Duration::from_secs(60);

/// What an engine has yielded: each page's newest contents, and the newest state.
#[derive(Default)]
struct Copy {
    preamble: bytes::Bytes,
    pages: BTreeMap<u64, Vec<u8>>,
    state: Vec<Record>,
    epochs: u64,
}

impl Copy {
    fn take(&mut self, item: CaptureItem, fresh: &mut bool) {
        match item {
            CaptureItem::Preamble(bytes) => self.preamble = bytes,
            CaptureItem::Pages(batch) => {
                let mut data = batch.data.chunks_exact(PAGE_SIZE);
                for entry in &batch.entries {
                    let gfn = gfn(*entry);
                    if !PageBatch::has_data(*entry) {
                        self.pages.remove(&gfn);
                    } else if let Some(page) = data.next() {
                        self.pages.insert(gfn, page.to_vec());
                    }
                }
            }
            CaptureItem::State(record) => {
                if std::mem::take(fresh) {
                    self.state.clear();
                }
                self.state.push(record);
            }
            CaptureItem::EndOfEpoch => {
                *fresh = true;
                self.epochs += 1;
            }
        }
    }

    fn record(&self, kind: u32) -> Option<&[u8]> {
        self.state.iter().find(|record| record.kind == kind).map(|record| &record.body[..])
    }
}

fn main() -> ExitCode {
    if let Err(error) = remusd::xen::soname::ensure() {
        eprintln!("engine-compare: {error}");
        return ExitCode::FAILURE;
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("engine-compare: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(Arguments::parse())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("engine-compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn collect(mut items: ItemReceiver) -> Result<Copy> {
    let mut copy = Copy::default();
    let mut fresh = true;
    while let Some(item) = items.recv().await? {
        copy.take(item, &mut fresh);
    }
    Ok(copy)
}

struct Guest {
    suspender: Suspender,
    guard: SuspendGuard,
    model: Option<DeviceModel>,
}

impl Guest {
    /// Serves an engine for so many epochs; in the last one the guest is left suspended. Whether it was suspended before says `stands`.
    async fn serve(
        &mut self,
        mut engine: Box<dyn Engine>,
        epochs: u64,
        interval: Duration,
        stands: bool,
    ) -> Result<()> {
        let mut epoch = 0;
        loop {
            match engine.next_call().await? {
                EngineCall::Suspend => {
                    tracing::debug!(epoch, "suspending");
                    if !stands {
                        let deadline = Instant::now() + PATIENCE;
                        self.guard.handle().arm(deadline);
                        self.suspender.suspend(deadline).await?;
                    }
                    engine.set_hard_mode(true);
                    engine.reply(1).await?;
                }
                EngineCall::Postcopy => {
                    epoch += 1;
                    if !stands && epoch < epochs {
                        self.suspender.resume().await?;
                        if let Some(fired) = self.guard.handle().disarm() {
                            bail!("the guard fired: {fired:?}");
                        }
                    }
                    engine.set_hard_mode(false);
                    engine.reply(1).await?;
                }
                EngineCall::Checkpoint => {
                    if epoch < epochs {
                        tokio::time::sleep(interval).await;
                    }
                    engine.reply(i32::from(epoch < epochs)).await?;
                }
                EngineCall::SwitchQemuLogdirty { enable } => {
                    if let Some(model) = &mut self.model {
                        model.log_dirty(enable, Instant::now() + PATIENCE).await?;
                    }
                    engine.reply(0).await?;
                }
                EngineCall::Complete { .. } => engine.reply(0).await?,
                EngineCall::Exited(_) => return Ok(()),
                EngineCall::Progress { what, done, total } => {
                    tracing::debug!("{what}: {done} of {total}");
                }
                EngineCall::Log { text, .. } => tracing::debug!("{text}"),
            }
        }
    }
}

async fn run(arguments: Arguments) -> Result<bool> {
    let domid = DomId(arguments.domid);
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(XenHypervisor::open()?);
    let store: Arc<dyn XenStore> = Arc::new(RealStore::open().await?);
    let info = hypervisor.domain(domid).await?.context("no such domain")?;
    let model = match info.guest_type {
        GuestType::Hvm => Some(DeviceModel::connect(domid, Instant::now() + PATIENCE).await?),
        GuestType::Pv | GuestType::Pvh => None,
    };
    let mut guest = Guest {
        suspender: Suspender::new(domid, Arc::clone(&hypervisor), store).await?,
        guard: SuspendGuard::start_real(domid)?,
        model,
    };
    let interval = Duration::from_millis(arguments.interval);
    let config = NativeConfig { ahead_after: Some(interval / 2), ..NativeConfig::new(domid) };
    let (native, items) = NativeEngine::spawn(config).await?;
    let native_copy = tokio::spawn(collect(items));
    guest.serve(Box::new(native), arguments.epochs, interval, false).await?;
    let native_copy = native_copy.await??;

    let (helper, items) = SaveHelper::spawn(SaveHelperConfig::new(domid)).await?;
    let helper_copy = tokio::spawn(collect(items));
    guest.serve(Box::new(helper), 1, interval, true).await?;
    let helper_copy = helper_copy.await??;
    guest.suspender.resume().await?;
    let fired = guest.guard.handle().disarm();
    anyhow::ensure!(fired.is_none(), "the guest did not stand still all the time: {fired:?}");
    Ok(alike(&native_copy, &helper_copy))
}

/// Prints the words in which two copies of a page differ.
fn show(gfn: u64, native: Option<&Vec<u8>>, helper: Option<&Vec<u8>>) {
    let (Some(native), Some(helper)) = (native, helper) else {
        return println!("page {gfn:#x}: in one copy only");
    };
    let words = native.as_chunks::<8>().0.iter().zip(helper.as_chunks::<8>().0).enumerate();
    for (index, (ours, theirs)) in words.filter(|(_, (ours, theirs))| ours != theirs).take(16) {
        println!(
            "page {gfn:#x}, offset {:#x}: {:016x} natively, {:016x} by the save helper",
            index * 8,
            u64::from_le_bytes(*ours),
            u64::from_le_bytes(*theirs)
        );
    }
}

fn alike(native: &Copy, helper: &Copy) -> bool {
    let mut good = true;
    let mut differ = Vec::new();
    for (gfn, page) in &helper.pages {
        if native.pages.get(gfn) != Some(page) {
            differ.push(*gfn);
        }
    }
    // A page that was there once and has gone since: the receiver keeps it and the guest never looks.
    let extra = native.pages.keys().filter(|gfn| !helper.pages.contains_key(gfn)).count();
    println!(
        "native: {} epochs, {} pages; save helper: {} pages; {} differ, {extra} only in the native copy",
        native.epochs,
        native.pages.len(),
        helper.pages.len(),
        differ.len()
    );
    if !differ.is_empty() {
        println!("pages that differ: {:x?}", &differ[..differ.len().min(20)]);
        for gfn in differ.iter().take(20) {
            show(*gfn, native.pages.get(gfn), helper.pages.get(gfn));
        }
        good = false;
    }
    if native.preamble != helper.preamble {
        println!("the static parts differ: {:?} and {:?}", native.preamble, helper.preamble);
        good = false;
    }
    for (name, kind) in
        [("TSC", kind::X86_TSC_INFO), ("HVM context", kind::HVM_CONTEXT), ("HVM params", kind::HVM_PARAMS)]
    {
        let (ours, theirs) = (native.record(kind), helper.record(kind));
        let same = ours == theirs;
        println!(
            "{name}: {:?} and {:?} bytes, {}",
            ours.map(<[u8]>::len),
            theirs.map(<[u8]>::len),
            if same { "alike" } else { "they differ" }
        );
        // Time goes on in the TSC record and in the context while the guest stands.
        good &= if kind == kind::HVM_PARAMS { same } else { ours.map(<[u8]>::len) == theirs.map(<[u8]>::len) };
    }
    good
}

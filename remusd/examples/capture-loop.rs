//! Developer tool: checkpoints of a running domain into nothing, or into a file that Xen's own tools can check.
//!
//! Prints what each epoch cost. `--kill-at PHASE` kills the helper there with SIGKILL and recovers, as a restarted daemon would;
//! `--hang` leaves the guest suspended, so that the guard thread must resume it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use remusd::capture::{Engine, EngineCall, ItemReceiver, NativeConfig, NativeEngine, SaveHelper, SaveHelperConfig};
use remusd::hvm::DeviceModel;
use remusd::ids::DomId;
use remusd::stream::{CaptureItem, PlainComposer, Record, RemusComposer};
use remusd::xen::{GuestType, Hypervisor, LogDirty, RealStore, SuspendGuard, Suspender, XenHypervisor, XenStore};
use tokio::sync::mpsc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Phase {
    Copy,
    Suspend,
    Postcopy,
    Checkpoint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Remus,
    Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    SaveHelper,
    Native,
}

#[derive(Parser)]
struct Arguments {
    /// Domain id
    domid: u32,
    /// Checkpoints after the first copy
    #[arg(short = 'n', default_value_t = 10)]
    checkpoints: u64,
    /// Milliseconds between resume and the next suspend
    #[arg(short, default_value_t = 200)]
    interval: u64,
    /// Which engine captures
    #[arg(long, value_enum, default_value = "save-helper")]
    engine: Which,
    /// Native engine: copy pages ahead so many milliseconds after an epoch's end
    #[arg(long)]
    ahead_after: Option<u64>,
    /// Write a whole xl stream to this file; needs --config
    #[arg(long, requires = "config")]
    stream: Option<PathBuf>,
    /// The domain's configuration: libxl's JSON
    #[arg(long)]
    config: Option<PathBuf>,
    /// What kind of stream to write
    #[arg(long, value_enum, default_value = "remus")]
    format: Format,
    /// Kill the helper in this phase of the third epoch, and recover
    #[arg(long, value_enum)]
    kill_at: Option<Phase>,
    /// Stop the helper in this phase of the third epoch, and serve it to its end
    #[arg(long, value_enum)]
    stop_at: Option<Phase>,
    /// Do not resume the third epoch: the guard has to
    #[arg(long)]
    hang: bool,
    /// Only put right what an earlier run left behind
    #[arg(long)]
    recover: bool,
    /// Milliseconds that the whole suspended section may take
    #[arg(long, default_value_t = 10_000)]
    hard_deadline: u64,
}

const QMP_PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    if let Err(error) = remusd::xen::soname::ensure() {
        eprintln!("capture-loop: {error}");
        return ExitCode::FAILURE;
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("capture-loop: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(Arguments::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capture-loop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Loop {
    arguments: Arguments,
    domid: DomId,
    hypervisor: Arc<dyn Hypervisor>,
    store: Arc<dyn XenStore>,
    suspender: Suspender,
    guard: SuspendGuard,
    model: Option<DeviceModel>,
    emulator: mpsc::UnboundedSender<Vec<Record>>,
}

async fn run(arguments: Arguments) -> Result<()> {
    let domid = DomId(arguments.domid);
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(XenHypervisor::open()?);
    let store: Arc<dyn XenStore> = Arc::new(RealStore::open().await?);
    println!("Xen {}, host {:?}", hypervisor.version().await?, hypervisor.host().await?);
    let Some(info) = hypervisor.domain(domid).await? else {
        bail!("no domain {domid}");
    };
    println!("{info:?}");
    if arguments.recover {
        println!("log-dirty left on: {}", hypervisor.log_dirty_is_on(domid).await?);
        let mut suspender = Suspender::new(domid, Arc::clone(&hypervisor), Arc::clone(&store)).await?;
        println!("settled: {:?}", suspender.settle(QMP_PATIENCE).await?);
        return Ok(hypervisor.log_dirty_off(domid).await?);
    }
    if let LogDirty::Unsupported(why) = hypervisor.log_dirty(domid).await? {
        bail!(why);
    }
    let model = match info.guest_type {
        GuestType::Hvm => Some(DeviceModel::connect(domid, Instant::now() + QMP_PATIENCE).await?),
        GuestType::Pv | GuestType::Pvh => None,
    };
    let suspender = Suspender::new(domid, Arc::clone(&hypervisor), Arc::clone(&store)).await?;
    let guard = SuspendGuard::start_real(domid)?;
    let (helper, items): (Box<dyn Engine>, ItemReceiver) = match arguments.engine {
        Which::SaveHelper => {
            let (helper, items) = SaveHelper::spawn(SaveHelperConfig::new(domid)).await?;
            (Box::new(helper), items)
        }
        Which::Native => {
            let ahead_after = arguments.ahead_after.map(Duration::from_millis);
            let config = NativeConfig { ahead_after, ..NativeConfig::new(domid) };
            let (engine, items) = NativeEngine::spawn(config).await?;
            (Box::new(engine), items)
        }
    };
    let (emulator, emulator_records) = mpsc::unbounded_channel();
    let consumer = tokio::spawn(consume(
        items,
        emulator_records,
        arguments.stream.clone(),
        arguments.config.clone(),
        arguments.format,
    ));
    let mut work = Loop { arguments, domid, hypervisor, store, suspender, guard, model, emulator };
    let outcome = work.epochs(helper).await;
    let Loop { emulator, model, hypervisor, store, .. } = work;
    drop(emulator);
    let written = consumer.await?;
    outcome?;
    println!("items: {}", written?);
    if let Some(model) = model {
        model.disconnect(Instant::now() + QMP_PATIENCE).await?;
    }
    println!("log-dirty on: {}", hypervisor.log_dirty_is_on(domid).await?);
    let state = hypervisor.domain(domid).await?.context("the domain is gone")?.state;
    println!("state: {state:?}");
    let pending = store.read(&format!("/local/domain/{domid}/control/shutdown")).await?;
    println!("control/shutdown: {pending:?}");
    Ok(())
}

impl Loop {
    async fn epochs(&mut self, mut helper: Box<dyn Engine>) -> Result<()> {
        let begun = Instant::now();
        let (mut epoch, mut before) = (0u64, helper.stats());
        let (mut asked, mut suspended) = (begun, begun);
        loop {
            if self.kills(epoch, Phase::Copy) && epoch == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                return self.recover(helper).await;
            }
            let call = helper.next_call().await?;
            if self.stops(epoch, &call) {
                println!("stopping the helper");
                helper.stop_gently();
            }
            match call {
                EngineCall::Suspend => {
                    if self.kills(epoch, Phase::Suspend) {
                        return self.recover(helper).await;
                    }
                    asked = Instant::now();
                    let deadline = asked + Duration::from_millis(self.arguments.hard_deadline);
                    self.guard.handle().arm(deadline);
                    helper.set_hard_mode(true);
                    let done = self.suspender.suspend(deadline).await?;
                    suspended = done.suspended;
                    self.save_device_model().await?;
                    answer(&mut helper, 1).await;
                }
                EngineCall::Postcopy => {
                    if self.kills(epoch, Phase::Postcopy) {
                        return self.recover(helper).await;
                    }
                    if self.arguments.hang && epoch == 2 {
                        return self.hang(helper).await;
                    }
                    let copied = Instant::now();
                    if let Some(model) = &mut self.model {
                        model.cont(Instant::now() + QMP_PATIENCE).await?;
                    }
                    self.suspender.resume().await?;
                    let resumed = Instant::now();
                    if let Some(fired) = self.guard.handle().disarm() {
                        bail!("the guard fired: {fired:?}");
                    }
                    helper.set_hard_mode(false);
                    answer(&mut helper, 1).await;
                    let stats = helper.stats();
                    println!(
                        "epoch {epoch}: suspend {:.1} ms, capture {:.1} ms, resume {:.1} ms, {} pages, {} KiB read so far",
                        ms(suspended - asked),
                        ms(copied - suspended),
                        ms(resumed - copied),
                        stats.pages - before.pages,
                        (stats.bytes - before.bytes) >> 10,
                    );
                    before = stats;
                }
                EngineCall::Checkpoint => {
                    if self.kills(epoch, Phase::Checkpoint) {
                        return self.recover(helper).await;
                    }
                    epoch += 1;
                    tokio::time::sleep(Duration::from_millis(self.arguments.interval)).await;
                    let go_on = epoch <= self.arguments.checkpoints;
                    answer(&mut helper, i32::from(go_on)).await;
                }
                EngineCall::SwitchQemuLogdirty { enable } => {
                    if let Some(model) = &mut self.model {
                        model.log_dirty(enable, Instant::now() + QMP_PATIENCE).await?;
                    }
                    answer(&mut helper, 0).await;
                }
                EngineCall::Progress { what, done, total } => {
                    tracing::debug!("{what}: {done} of {total}");
                }
                EngineCall::Log { level, text } => tracing::debug!("helper({level}): {text}"),
                EngineCall::Complete { retval, errno } => {
                    println!("complete: {retval}, errno {errno}");
                    answer(&mut helper, 0).await;
                }
                EngineCall::Exited(status) => {
                    println!(
                        "settled: {:?}, guard: {:?}",
                        self.suspender.settle(QMP_PATIENCE).await?,
                        self.guard.handle().disarm()
                    );
                    println!(
                        "helper: {status}; {epoch} epochs in {:.1} s; {:?}",
                        begun.elapsed().as_secs_f64(),
                        helper.stats()
                    );
                    return Ok(());
                }
            }
        }
    }

    fn kills(&self, epoch: u64, phase: Phase) -> bool {
        let when = if phase == Phase::Copy { 0 } else { 2 };
        self.arguments.kill_at == Some(phase) && epoch == when
    }

    fn stops(&self, epoch: u64, call: &EngineCall) -> bool {
        match self.arguments.stop_at {
            Some(Phase::Copy) => epoch == 0 && matches!(call, EngineCall::Progress { done, .. } if *done > 0),
            Some(Phase::Suspend) => epoch == 2 && matches!(call, EngineCall::Suspend),
            Some(Phase::Postcopy) => epoch == 2 && matches!(call, EngineCall::Postcopy),
            Some(Phase::Checkpoint) => epoch == 2 && matches!(call, EngineCall::Checkpoint),
            None => false,
        }
    }

    async fn save_device_model(&mut self) -> Result<()> {
        let Some(model) = &mut self.model else {
            let _ = self.emulator.send(Vec::new());
            return Ok(());
        };
        let begun = Instant::now();
        let deadline = begun + QMP_PATIENCE;
        model.stop(deadline).await?;
        let state = model.save(deadline).await?;
        let keys = DeviceModel::xenstore_record(&*self.store, self.domid, DomId(0)).await?;
        println!("device model: {} bytes in {:.1} ms", state.body.len(), ms(begun.elapsed()));
        // Nobody takes it once the helper was stopped.
        let _ = self.emulator.send(keys.into_iter().chain([state]).collect());
        Ok(())
    }

    /// What a restarted daemon has to do.
    async fn recover(&mut self, helper: Box<dyn Engine>) -> Result<()> {
        println!("killing the helper");
        helper.kill().await;
        println!("log-dirty left on: {}", self.hypervisor.log_dirty_is_on(self.domid).await?);
        if let Some(model) = &mut self.model {
            let deadline = Instant::now() + QMP_PATIENCE;
            model.log_dirty(false, deadline).await?;
            model.cont(deadline).await?;
        }
        println!("settled: {:?}", self.suspender.settle(QMP_PATIENCE).await?);
        self.hypervisor.log_dirty_off(self.domid).await?;
        println!("guard: {:?}", self.guard.handle().disarm());
        Ok(())
    }

    async fn hang(&mut self, helper: Box<dyn Engine>) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(self.arguments.hard_deadline + 500)).await;
        let state = self.hypervisor.domain(self.domid).await?.context("gone")?.state;
        println!("after the hard deadline: {state:?}; guard: {:?}", self.guard.handle().disarm());
        self.recover(helper).await
    }
}

/// A helper that is gone says so with its exit status.
async fn answer(helper: &mut Box<dyn Engine>, value: i32) {
    if let Err(error) = helper.reply(value).await {
        println!("{error}");
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Takes the items; writes the stream if a file is wanted.
async fn consume(
    mut items: ItemReceiver,
    mut emulator: mpsc::UnboundedReceiver<Vec<Record>>,
    stream: Option<PathBuf>,
    config: Option<PathBuf>,
    format: Format,
) -> Result<u64> {
    let mut file = stream.map(std::fs::File::create).transpose()?;
    let config = config.map(std::fs::read_to_string).transpose()?.unwrap_or_default();
    let mut state: Vec<Record> = Vec::new();
    let mut newest: Vec<Record> = Vec::new();
    let mut count = 0;
    while let Some(item) = items.recv().await? {
        count += 1;
        let Some(file) = &mut file else { continue };
        let mut write = |pieces: &[bytes::Bytes]| pieces.iter().try_for_each(|piece| file.write_all(piece));
        match item {
            CaptureItem::Preamble(preamble) => write(&RemusComposer::head(&config, &preamble)?)?,
            CaptureItem::Pages(batch) => write(&RemusComposer::pages(&batch)?)?,
            CaptureItem::State(record) => state.push(record),
            CaptureItem::EndOfEpoch => {
                state.extend(emulator.recv().await.context("no device model state")?);
                if format == Format::Remus {
                    write(&[RemusComposer::end_of_epoch(&state)])?;
                }
                newest = std::mem::take(&mut state);
            }
        }
    }
    if let Some(file) = &mut file
        && format == Format::Plain
    {
        file.write_all(&PlainComposer::tail(&newest))?;
    }
    Ok(count)
}

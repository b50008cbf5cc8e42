//! An orderly end on SIGINT, SIGTERM and SIGHUP.

use anyhow::{Context, Result, anyhow};
use tokio::signal::unix::{SignalKind, signal};

use crate::progress;
use crate::run;

/// Runs `job` on a thread of its own; a signal meanwhile ends the program with what it has started.
pub fn interruptible<T: Send + 'static>(job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut ended = std::pin::pin!(end_signal()?);
        let mut job = tokio::task::spawn_blocking(job);
        tokio::select! {
            result = &mut job => result.context("panicked")?,
            () = &mut ended => leave(),
        }
    });
    runtime.shutdown_background();
    result
}

/// Like [`interruptible`], then says `started` and waits for a signal, and drops in order.
pub fn until_signal<T: Send + 'static>(
    job: impl FnOnce() -> Result<T> + Send + 'static,
    started: impl FnOnce(&T),
) -> Result<()> {
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut ended = std::pin::pin!(end_signal()?);
        let mut job = tokio::task::spawn_blocking(job);
        let value = tokio::select! {
            result = &mut job => result.map_err(|panic| anyhow!("panicked: {panic}"))??,
            () = &mut ended => leave(),
        };
        started(&value);
        ended.await;
        progress!("ending");
        drop(value);
        Ok(())
    });
    runtime.shutdown_background();
    result
}

/// Ends the program at once. The kernel ends the hosts with it, and with them their network.
fn leave() -> ! {
    progress!("interrupted: ending the hosts");
    run::remove_own_files();
    std::process::exit(130)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// A future that ends at the first SIGINT, SIGTERM or SIGHUP from now on.
fn end_signal() -> Result<impl Future<Output = ()>> {
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
            _ = hup.recv() => {}
        }
    })
}

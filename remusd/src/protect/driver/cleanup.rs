//! The end of a protection: devices, engine, link and domain are put back or put away.

use std::time::Duration;

use devices::Ending;
use devices::netbuffer::NetError;

use super::super::fate;
use super::super::machine::{DomainFate, Event, GuestEnd, Kept, Output};
use super::Driver;
use crate::capture::{Engine, EngineCall};
use crate::ops::EventKind;

/// How long the capture engine may take to unwind before it is killed.
const UNWIND: Duration = Duration::from_secs(10);

impl Driver {
    pub(super) async fn clean_up(&mut self, output: Output, fate: DomainFate, kept: Kept) {
        self.timer = None;
        self.stop_deadline = None;
        self.handover_deadline = None;
        let ending = match output {
            Output::Release => Ending::Release,
            Output::Discard => Ending::Discard,
        };
        // Output first: nobody should wait for the engine (R6), and a loser is sealed before anything else (R3).
        let mut complaints: Vec<String> =
            self.parts.devices.teardown(ending).await.iter().map(ToString::to_string).collect();
        if output == Output::Release {
            // The owner is guarded against nothing; before its domain may be booted anew.
            if let Err(error) = self.parts.state.gate().release(self.parts.domain.uuid) {
                complaints.push(error.to_string());
            }
            if let Err(error) = self.parts.state.put_autostart_back(self.parts.domain.uuid) {
                complaints.push(error.to_string());
            }
            // An interface that was made anew under protection was sealed; its owner opens it.
            for vif in &self.parts.record.vifs {
                match devices::netbuffer::unseal(vif).await {
                    Ok(()) | Err(NetError::NoLink(_)) => {}
                    Err(error) => complaints.push(error.to_string()),
                }
            }
        }
        if self.may_be_suspended && output == Output::Release {
            self.ensure_running().await;
        }
        complaints.extend(self.end_engine().await);
        self.parts.control.close().await;
        match fate {
            DomainFate::Keep => {}
            DomainFate::Destroy => {
                if let Err(error) = self.parts.toolstack.destroy(self.parts.domid).await {
                    complaints.push(error.to_string());
                }
            }
            // Until the first suspend xl's own monitor is there and does it.
            DomainFate::ByConfig(_) if !self.parts.record.monitor => {}
            DomainFate::ByConfig(end) => complaints.extend(self.by_config(end).await),
        }
        if complaints.is_empty() {
            if kept == Kept::Forget {
                self.forget();
            }
        } else {
            self.unfinished = true;
            // The record stays: `remus recover` finishes what could not be done now.
            complaints.push("`remus recover` tries again".into());
        }
        for text in &complaints {
            tracing::error!(domain = self.parts.domain.name, "cleaning up: {text}");
        }
        self.queue.push_back(Event::CleanedUp);
    }

    /// Nothing is left that a restarted daemon would have to put right.
    pub(super) fn forget(&mut self) {
        if self.unfinished {
            return;
        }
        if let Err(error) = self.parts.state.remove_primary(self.parts.domain.uuid) {
            tracing::error!(domain = self.parts.domain.name, "{error}");
        }
    }

    async fn by_config(&mut self, end: GuestEnd) -> Vec<String> {
        let name = self.parts.domain.name.clone();
        let done = fate::apply(&*self.parts.toolstack, self.parts.domid, &name, &self.parts.config, end).await;
        match done {
            Ok((text, new)) => {
                self.tell(EventKind::GuestEnded, format!("the guest ended ({end}) and was {text}"));
                self.reborn.send_replace(new);
                vec![]
            }
            Err(error) => {
                self.tell(EventKind::GuestEnded, format!("the guest ended ({end}); {error}"));
                vec![error.to_string()]
            }
        }
    }

    /// Ends the engine so that log-dirty is off afterwards, also if it must be killed.
    async fn end_engine(&mut self) -> Option<String> {
        let engine = self.engine.take()?;
        let unwound = tokio::time::timeout(UNWIND, self.unwind(engine)).await;
        if unwound != Ok(true) {
            tracing::warn!(
                domain = self.parts.domain.name,
                "the capture engine did not unwind, or not in time, and was killed"
            );
            let _ = self.switch_model_log_dirty(false).await;
        }
        match self.parts.hypervisor.domain(self.parts.domid).await {
            Ok(Some(info)) if !info.state.dying => {
                self.parts.hypervisor.log_dirty_off(self.parts.domid).await.err().map(|e| e.to_string())
            }
            _ => None,
        }
    }

    /// Answers the engine's calls until it has put everything back; whether it has. Dropping it (on a timeout) kills it.
    async fn unwind(&mut self, mut engine: Box<dyn Engine>) -> bool {
        engine.stop_gently();
        if self.engine_owed {
            // It may have been a failure and no call that was owed: what it still says is listened to all the same.
            let _ = engine.reply(0).await;
        }
        // A failure that was not told yet comes once, before the calls by which the engine cleans up after it.
        let mut told = false;
        loop {
            let call = match engine.next_call().await {
                Ok(call) => call,
                Err(_) if !std::mem::replace(&mut told, true) => continue,
                Err(_) => return false,
            };
            let value = match call {
                EngineCall::SwitchQemuLogdirty { enable } => self.switch_model_log_dirty(enable).await,
                EngineCall::Suspend | EngineCall::Postcopy | EngineCall::Checkpoint => 0,
                EngineCall::Complete { .. } => {
                    let _ = engine.reply(0).await;
                    continue;
                }
                EngineCall::Exited(_) => return true,
                EngineCall::Progress { .. } | EngineCall::Log { .. } => continue,
            };
            if engine.reply(value).await.is_err() {
                return false;
            }
        }
    }
}
